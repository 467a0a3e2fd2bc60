"""Dropout, residual and norm in one pass: plain, on a subset of rows, and with two branches."""

import torch
from torch import nn

from flash_attn.ops.triton.layer_norm import layer_norm_fn


def _byte_mask(mask, like):
    """uint8, 1 = kept; all ones without dropout."""
    return torch.ones(like.shape, dtype=torch.uint8, device=like.device) if mask is None else mask.to(torch.uint8)


def _add_norm(
    x0, residual, weight, bias, dropout_p, epsilon, rowscale, layerscale, prenorm, residual_in_fp32, is_rms_norm
):
    """(z, t, mask) with t = residual + layerscale * dropout(x0 * rowscale)."""
    x, dtype = x0, x0.dtype
    if layerscale is not None:  # commutes with dropout; in float32, so that nothing is rounded twice
        x = x0.float() * layerscale.float()
    z, t, mask, _ = layer_norm_fn(
        x, weight, bias, residual=residual, eps=epsilon, dropout_p=dropout_p, rowscale=rowscale, prenorm=True,
        residual_in_fp32=residual_in_fp32, is_rms_norm=is_rms_norm, return_dropout_mask=True, out_dtype=dtype,
    )  # fmt: skip
    if residual is None and not residual_in_fp32:
        t = t.to(dtype)
    return z, t, mask


def _results(prenorm, return_dropout_mask, outputs, t, masks):
    results = (*outputs, *((t,) if prenorm else ()), *(masks if return_dropout_mask else ()))
    return results[0] if len(results) == 1 else results


def _plain(
    x0, residual, weight, bias, dropout_p, epsilon, rowscale, layerscale, prenorm, residual_in_fp32,
    return_dropout_mask, is_rms_norm,
):  # fmt: skip
    z, t, mask = _add_norm(
        x0, residual, weight, bias, dropout_p, epsilon, rowscale, layerscale, prenorm, residual_in_fp32, is_rms_norm
    )
    return _results(prenorm, return_dropout_mask, (z,), t, (_byte_mask(mask, x0),))


def _scatter_rows(z, out_subset, out_numrows):
    """Row r of z at row out_subset[r] - 1 of (out_numrows, n); 0 drops it."""
    target = out_subset.reshape(-1).long()
    # Dropped rows share one row behind the others, which is cut off.
    target = torch.where(target > 0, target - 1, out_numrows)
    out = z.new_zeros(out_numrows + 1, z.shape[-1])
    return out.index_copy(0, target, z.reshape(-1, z.shape[-1]))[:out_numrows]


def _subset(
    x0, residual, weight, bias, dropout_p, epsilon, layerscale, x0_subset, out_subset, rowscale_const, out_numrows,
    prenorm, residual_in_fp32, return_dropout_mask, is_rms_norm,
):  # fmt: skip
    rows, x, source = x0.reshape(-1, x0.shape[-1]), x0, None
    if x0_subset is not None:
        source = x0_subset.reshape(-1).long()
        padded = torch.cat((rows.new_zeros(1, rows.shape[1]), rows))  # index 0 is the absent row
        x = padded[source].view(*(x0_subset.shape if x0.dim() == 2 else (-1, *x0.shape[1:-1])), x0.shape[-1])
    wide = torch.promote_types(x0.dtype, torch.float32)  # in x0's precision the factor would be rounded
    rowscale = torch.full(x.shape[:-1], rowscale_const, dtype=wide, device=x0.device)
    z, t, mask = _add_norm(
        x, residual, weight, bias, dropout_p, epsilon, rowscale, layerscale, prenorm, residual_in_fp32, is_rms_norm
    )
    if out_subset is not None:
        z = _scatter_rows(z, out_subset, out_numrows).view(-1, *x0.shape[1:])
    mask = _byte_mask(mask, x)
    if source is not None:  # the mask belongs to the rows of x0
        kept = mask.new_ones(rows.shape[0] + 1, rows.shape[1])
        kept[source] = mask.reshape(-1, rows.shape[1])
        mask = kept[1:].view(x0.shape)
    return _results(prenorm, return_dropout_mask, (z,), t, (mask,))


def _parallel_residual(
    x0, x1, residual, weight0, bias0, weight1, bias1, dropout_p, epsilon, prenorm, residual_in_fp32,
    return_dropout_mask, is_rms_norm,
):  # fmt: skip
    z0, *z1, t, mask0, mask1 = layer_norm_fn(
        x0, weight0, bias0, residual=residual, x1=x1, weight1=weight1, bias1=bias1, eps=epsilon, dropout_p=dropout_p,
        prenorm=True, residual_in_fp32=residual_in_fp32, is_rms_norm=is_rms_norm, return_dropout_mask=True,
    )  # fmt: skip
    masks = (_byte_mask(mask0, x0), None if x1 is None else _byte_mask(mask1, x1))
    return _results(prenorm, return_dropout_mask, (z0, z1[0] if z1 else None), t, masks)


class DropoutAddLayerNormFn:
    """`dropout_add_layer_norm` called as an autograd class is."""

    @staticmethod
    def apply(
        x0, residual, gamma, beta, rowscale, colscale, dropout_p, epsilon, residual_in_fp32=False, prenorm=False,
        is_rms_norm=False, return_dmask=False,
    ):  # fmt: skip
        """z, then t with prenorm, then the mask with return_dmask."""
        return _plain(
            x0, residual, gamma, beta, dropout_p, epsilon, rowscale, colscale, prenorm, residual_in_fp32,
            return_dmask, is_rms_norm,
        )  # fmt: skip


class DropoutAddLayerNormSubsetFn:
    """`dropout_add_layer_norm_subset` called as an autograd class is."""

    @staticmethod
    def apply(
        x0, residual, gamma, beta, colscale, x0_subset, out_subset, dropout_p, epsilon, rowscale_const, out_numrows,
        residual_in_fp32=False, prenorm=False, is_rms_norm=False, return_dmask=False,
    ):  # fmt: skip
        """z, then t with prenorm, then the mask with return_dmask."""
        return _subset(
            x0, residual, gamma, beta, dropout_p, epsilon, colscale, x0_subset, out_subset, rowscale_const,
            out_numrows, prenorm, residual_in_fp32, return_dmask, is_rms_norm,
        )  # fmt: skip


class DropoutAddLayerNormParallelResidualFn:
    """`dropout_add_layer_norm_parallel_residual` called as an autograd class is."""

    @staticmethod
    def apply(
        x0, x1, residual, gamma0, beta0, gamma1, beta1, dropout_p, epsilon, residual_in_fp32=False, prenorm=False,
        is_rms_norm=False, return_dmask=False,
    ):  # fmt: skip
        """z0 and z1, then t with prenorm, then two masks with return_dmask."""
        return _parallel_residual(
            x0, x1, residual, gamma0, beta0, gamma1, beta1, dropout_p, epsilon, prenorm, residual_in_fp32,
            return_dmask, is_rms_norm,
        )  # fmt: skip


def layer_norm(x, weight, bias, epsilon):
    """Layer norm over the last dimension."""
    return layer_norm_fn(x, weight, bias, eps=epsilon)


def dropout_add_layer_norm(
    x0,
    residual,
    weight,
    bias,
    dropout_p,
    epsilon,
    rowscale=None,
    layerscale=None,
    prenorm=False,
    residual_in_fp32=False,
    return_dropout_mask=False,
):
    """norm(t) with t = residual + layerscale * dropout(x0 * rowscale).

    Args:
        x0: (..., n); residual: the same shape or None; weight, bias, layerscale: (n,); rowscale: (...), no gradient.
        residual_in_fp32: t is float32 when there is no residual, whose dtype it has otherwise.

    Returns:
        z in x0's dtype; then t with prenorm; then a uint8 mask (1 = kept) with return_dropout_mask.
    """
    return _plain(
        x0, residual, weight, bias, dropout_p, epsilon, rowscale, layerscale, prenorm, residual_in_fp32,
        return_dropout_mask, False,
    )  # fmt: skip


def dropout_add_layer_norm_subset(
    x0,
    residual,
    weight,
    bias,
    dropout_p,
    epsilon,
    layerscale=None,
    x0_subset=None,
    out_subset=None,
    rowscale_const=1.0,
    out_numrows=0,
    prenorm=False,
    residual_in_fp32=False,
    return_dropout_mask=False,
):
    """`dropout_add_layer_norm` of rows some of which are absent from x0 or from the output.

    Args:
        x0: (rows, n) or (sequences, s, n), the present rows only.
        x0_subset, out_subset: int32 of the full row shape, 1-based row of x0 and of the output; 0 is absent.
        rowscale_const: factor on x0.
        out_numrows: rows of the output when out_subset is given.

    Returns:
        z, (out_numrows, n) or (out_numrows / s, s, n) as x0 has it; then t in the full shape with prenorm; then x0's
        mask with return_dropout_mask.
    """
    return _subset(
        x0, residual, weight, bias, dropout_p, epsilon, layerscale, x0_subset, out_subset, rowscale_const,
        out_numrows, prenorm, residual_in_fp32, return_dropout_mask, False,
    )  # fmt: skip


def dropout_add_layer_norm_parallel_residual(
    x0,
    x1,
    residual,
    weight0,
    bias0,
    weight1,
    bias1,
    dropout_p,
    epsilon,
    prenorm=False,
    residual_in_fp32=False,
    return_dropout_mask=False,
):
    """Two norms of t = residual + dropout(x0) + dropout(x1); x1 may be None.

    Returns:
        (z0, z1), z1 None without weight1; then t with prenorm; then two uint8 masks with return_dropout_mask.
    """
    return _parallel_residual(
        x0, x1, residual, weight0, bias0, weight1, bias1, dropout_p, epsilon, prenorm, residual_in_fp32,
        return_dropout_mask, False,
    )  # fmt: skip


class DropoutAddLayerNorm(nn.Module):
    """`dropout_add_layer_norm` with its parameters; dropout in training only."""

    def __init__(self, hidden_size, prenorm=False, p=0.0, eps=1e-5, residual_in_fp32=False, device=None, dtype=None):
        super().__init__()
        self.prenorm = prenorm
        self.p = p
        self.eps = eps
        self.residual_in_fp32 = residual_in_fp32
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))

    def forward(self, x0, residual=None):
        """z, or (z, t) with prenorm."""
        return dropout_add_layer_norm(
            x0,
            residual,
            self.weight,
            self.bias,
            self.p if self.training else 0.0,
            self.eps,
            prenorm=self.prenorm,
            residual_in_fp32=self.residual_in_fp32,
        )
